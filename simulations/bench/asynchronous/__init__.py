"""A buffer beside rounds in a real federation of machines that differ tenfold in speed."""
