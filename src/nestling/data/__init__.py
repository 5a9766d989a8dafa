"""Text into batches: sources, chats, the cache of tokens, blends, packing; and batches of generated problems."""
