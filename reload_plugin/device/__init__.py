"""Everything about hardware: staging memory, copies, hashing, free memory."""
