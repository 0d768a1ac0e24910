"""Something new of each kind, one file each: an answer, a storage, a format. The suite lives without them."""
