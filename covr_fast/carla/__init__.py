"""Two driving tasks on CARLA servers, the scenarios #HW and #GP of Xia et al. 2026: `carla-highway` and
`carla-pedestrians`. docs/carla.md says how to start a server, and what of this has been run on one."""
