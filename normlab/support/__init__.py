"""What every other module may use: checks, files, seeds, devices, figures, progress."""
