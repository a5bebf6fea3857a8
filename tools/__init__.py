"""The programs: arguments and printing, nothing else."""
