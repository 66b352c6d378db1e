"""Result files as one HTML page: `fastfill report`. Needs matplotlib, and only when a figure is drawn."""
