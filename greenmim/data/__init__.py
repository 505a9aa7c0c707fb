"""Images: where they come from, their crops, and batches of them with planned masks."""
