"""What the command line does with whole images, and how a layer becomes a directory."""
