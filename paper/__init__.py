"""What the paper claims, and what was measured on stand-ins. `paper` imports `delora`, never the other way round."""
