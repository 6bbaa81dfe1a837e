"""Files of an exported Hugging Face folder, the PyTorch model among them; they import nothing of this library."""
