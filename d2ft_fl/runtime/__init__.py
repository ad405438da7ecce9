"""Back ends without Flower: in this process, or in worker processes."""
