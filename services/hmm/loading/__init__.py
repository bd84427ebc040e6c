"""From a checkpoint's files into device memory."""
