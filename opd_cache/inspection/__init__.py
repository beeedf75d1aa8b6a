"""Looking at responses token by token: read.py asks the views, show.py draws what it gives."""
