"""Readers of other tools' data: what they find becomes a run folder.  `bring` in recon.importers.bring is the entry."""
