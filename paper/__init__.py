"""What the paper claims and what we measured. It imports `delora`, never the other way round."""
