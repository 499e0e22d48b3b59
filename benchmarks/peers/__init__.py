"""The same workloads through tgis and through its peers, on one machine, in alternation."""
