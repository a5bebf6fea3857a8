"""What trained networks say of files: classes, masks, and sheets of pictures with both."""
