"""What an editing leaves on the screen and in its run folder: counts, reasons, contact sheets."""
