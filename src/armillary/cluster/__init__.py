"""What computation runs on: this machine, measured, and the catalogue of devices, links, nodes and racks."""
