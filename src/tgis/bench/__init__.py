"""Where the time of a step goes, on this machine and with any model: `tgis bench`."""
