"""The DPO loss step against every peer."""
