"""Files of other people: pictures, volumes, masks, and which belong together."""
