"""How an input pipeline is carried out: by threads and processes of this machine, or in virtual time."""
