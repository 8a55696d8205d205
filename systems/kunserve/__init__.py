"""KunServe (EuroSys'26): drop duplicate parameters, not requests."""
