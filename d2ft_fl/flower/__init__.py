"""The project as a Flower app: server app, client app, records, SuperLink."""
