"""What long runs need: precision and compilation, files, resume, the terminal. Skip on first reading."""
