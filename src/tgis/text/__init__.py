"""From tokens to text and where it stops: pure, synchronous, no I/O."""
