"""Virtual time over HTTP, for the page: `armillary simulate` in processes of its own, bounded."""
