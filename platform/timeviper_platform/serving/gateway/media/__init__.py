"""Media that requests bring or name: uploads, addresses and their contents."""
