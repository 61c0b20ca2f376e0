"""The compressors where states pass between tiles: chunks of any length, in Triton."""
