"""What will stand behind every slot: small text that can be read, diffed, edited and checked without weights."""
