"""The embedded Hub: a real Hub in one process and one folder, for the unmodified Hugging Face clients."""
