"""The experiment itself: components by discovery, launching ranks, measuring, checking and recording."""
