"""What the rules share: the chunked algebra, the choice of an implementation, one token at a time."""
