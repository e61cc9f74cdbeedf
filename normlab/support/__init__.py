"""What every other module may use: checks, files, locks, seeds, devices, figures, output.

Some go with a file of the shelf, and hold what need not be read there: layers with `model`,
dataset_base with `data`, schedulers with `training`, filter_banks with `penalties` and
`optimizers`, epoch_rows with `history`, grad_cam with `analysis`, curves with `plots`, command_line
with `cli`.
"""
