"""What a model costs: FLOPs, bytes and milliseconds."""
