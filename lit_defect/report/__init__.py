"""The verb `report`: run folders in, one HTML file, CSV and LaTeX tables and a W&B report out. No torch here.

`collect` reads run folders, `contents` decides what is said of them, in the blocks of `blocks`; `html`, `latex` and
`wandb_report` write those down.
"""
