"""What is done with a checkpoint, or before a run: reconstruct, convert, export, doctor."""
