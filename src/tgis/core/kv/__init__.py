"""Who may keep keys and values where: accounting only, no tensors."""
