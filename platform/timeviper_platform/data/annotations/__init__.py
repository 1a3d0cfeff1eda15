"""Other people's labels as samples."""
