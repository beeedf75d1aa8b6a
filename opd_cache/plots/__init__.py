"""Figures for papers: what they show is asked in SQL (data.py) and drawn with matplotlib (draw.py)."""
