"""Train the small LLaMA-architecture model that ships inside ``tgis.demo``."""
