"""Systems that HarMoEny is compared with: one file each, found by discovery."""
