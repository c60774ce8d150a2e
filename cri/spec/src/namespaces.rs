//! Namespaces: new, joined by path, or the host's.

use oci_spec::runtime::{self as oci, LinuxNamespaceType as Kind};

use crate::error::SpecError;
use crate::input::{Namespace, SpecInput};
use crate::mounts::id_maps;

/// Maps of users and of groups.
type Maps = (Vec<oci::LinuxIdMapping>, Vec<oci::LinuxIdMapping>);

/// The list of namespaces and the maps of the user namespace.
pub(crate) fn namespaces(input: &SpecInput) -> Result<(Vec<oci::LinuxNamespace>, Option<Maps>), SpecError> {
    let ns = &input.namespaces;
    let mut list = Vec::new();
    let mut maps = None;
    // The user namespace first: the others are entered or made with its rights.
    if let Some(user) = &ns.user {
        if user.uids.is_empty() || user.gids.is_empty() {
            return Err(SpecError::invalid(
                "userns_options",
                "",
                "has no map of users or groups",
            ));
        }
        maps = Some((
            id_maps("userns_options.uids", &user.uids)?,
            id_maps("userns_options.gids", &user.gids)?,
        ));
        list.push(one(
            Kind::User,
            user.path.clone().map_or(Namespace::New, Namespace::Path),
        )?);
    }
    for (kind, wish) in [
        (Kind::Network, &ns.network),
        (Kind::Pid, &ns.pid),
        (Kind::Ipc, &ns.ipc),
        (Kind::Uts, &ns.uts),
    ] {
        if *wish != Namespace::Host {
            list.push(one(kind, wish.clone())?);
        }
    }
    list.push(one(Kind::Mount, Namespace::New)?);
    if ns.cgroup != Namespace::Host {
        list.push(one(Kind::Cgroup, ns.cgroup.clone())?);
    }
    Ok((list, maps))
}

fn one(kind: Kind, wish: Namespace) -> Result<oci::LinuxNamespace, SpecError> {
    let mut namespace = oci::LinuxNamespace::default();
    namespace.set_typ(kind);
    if let Namespace::Path(path) = wish {
        if !path.is_absolute() {
            let shown = path.to_string_lossy();
            return Err(SpecError::invalid("namespaces", shown, "is not an absolute path"));
        }
        namespace.set_path(Some(path));
    }
    Ok(namespace)
}
