//! Reading a namespace by netlink.

use futures::{Stream, TryStreamExt};
use rtnetlink::Handle;
use rtnetlink::IpVersion;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::route::RouteMessage;

use super::{Found, Namespace, NetworkError};

impl Found {
    /// What the namespace holds now.
    pub async fn scan(namespace: &Namespace) -> Result<Self, NetworkError> {
        let netlink = namespace.netlink();
        let links = all("cannot list the interfaces", netlink.link().get().execute()).await?;
        let addresses = all("cannot list the addresses", netlink.address().get().execute()).await?;
        // Most namespaces hold the loopback device alone.
        if links.iter().all(|one| one.header.index == 1) {
            return Ok(Self::of(&links, addresses, Vec::new(), Vec::new(), Vec::new()));
        }
        let neighbours = netlink.neighbours().get().execute();
        let neighbours = all("cannot list the neighbours", neighbours).await?;
        let mut routes = Vec::new();
        let mut rules = Vec::new();
        for (family, version) in
            [(AddressFamily::Inet, IpVersion::V4), (AddressFamily::Inet6, IpVersion::V6)]
        {
            routes.extend(list_routes(netlink, family).await?);
            let listed = netlink.rule().get(version).execute();
            rules.extend(all("cannot list the rules", listed).await?);
        }
        Ok(Self::of(&links, addresses, routes, neighbours, rules))
    }

    /// The number of the interface of that name.
    pub async fn index_of(namespace: &Namespace, name: &str) -> Result<u32, NetworkError> {
        let what = "cannot find an interface";
        let listed = namespace.netlink().link().get().match_name(name.to_owned()).execute();
        let listed = all(what, listed).await?;
        let first = listed.first().map(|link| link.header.index);
        first.ok_or(rtnetlink::Error::RequestFailed).map_err(NetworkError::netlink(what))
    }
}

async fn list_routes(
    netlink: &Handle,
    family: AddressFamily,
) -> Result<Vec<RouteMessage>, NetworkError> {
    let mut asked = RouteMessage::default();
    asked.header.address_family = family;
    all("cannot list the routes", netlink.route().get(asked).execute()).await
}

async fn all<T>(
    what: &'static str,
    listed: impl Stream<Item = Result<T, rtnetlink::Error>>,
) -> Result<Vec<T>, NetworkError> {
    listed.try_collect().await.map_err(NetworkError::netlink(what))
}
