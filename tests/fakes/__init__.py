"""Stand-ins that tests share: small networks, records, data sets on disk, a Hub on the loopback interface."""
