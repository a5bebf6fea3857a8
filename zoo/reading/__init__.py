"""Data: pictures, volumes and masks in files, which belong together, what ships inside packages, and what is composed of it."""
