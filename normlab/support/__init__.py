"""What every other module may use: checks, files, locks, seeds, devices, figures, output."""
