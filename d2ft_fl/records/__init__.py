"""What a run leaves behind: its folder, lines, summary, versions, trackers."""
