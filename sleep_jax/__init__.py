"""Language models that sleep: context consolidated into fast weights before its cache is evicted."""
