//! Routes as they are pushed: which broker leads which queues of a topic.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use drumlin_proto::native::routes_client::RoutesClient;
use drumlin_proto::native::{self, TopicType, WatchRoutesRequest};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::connection::{Address, Backoff, Connections};
use crate::error::{Code, Error};

/// Access points that are watched at once.
const WATCHES: usize = 2;

/// Where the queues of a topic are.
#[derive(Clone, Debug)]
pub(crate) struct Route {
    pub(crate) exists: bool,
    pub(crate) kind: TopicType,
    /// By broker group name, ascending.
    pub(crate) groups: Vec<GroupRoute>,
}

impl Route {
    pub(crate) fn group(&self, broker_group: &str) -> Option<&GroupRoute> {
        self.groups.iter().find(|group| &*group.broker_group == broker_group)
    }
}

/// One broker group's part.
#[derive(Clone, Debug)]
pub(crate) struct GroupRoute {
    pub(crate) broker_group: Arc<str>,
    pub(crate) queue_count: u32,
    /// A live replica may stand in while the broker group elects; `None` where there is none.
    pub(crate) leader: Option<Address>,
    pub(crate) term: u64,
}

/// What was pushed so far; pure.
#[derive(Debug, Default)]
struct RouteTable {
    topics: HashMap<String, Arc<Route>>,
    /// Highest term seen of each broker group, and who led in it.
    leaders: HashMap<String, (u64, Option<Address>)>,
    /// Were created here; who says that they do not exist has not heard yet.
    expected: HashSet<String>,
}

impl RouteTable {
    /// Takes over what was pushed. A leader of an older term than one already seen is ignored: it
    /// comes from someone who has not heard yet.
    fn apply(&mut self, pushed: native::TopicRoute) {
        if pushed.exists {
            self.expected.remove(&pushed.topic);
        } else if self.expected.contains(&pushed.topic) {
            return;
        }
        let kind = pushed.r#type();
        let groups = pushed.queues.into_iter().map(|queues| {
            let leader = queues.leader.as_ref().and_then(|a| Address::of_native(a).ok());
            let known = self.leaders.entry(queues.broker_group.clone()).or_default();
            // Who sees nobody of a group may be cut off from it itself.
            let sees_one = leader.is_some() && queues.term == known.0;
            if queues.term > known.0 || sees_one {
                *known = (queues.term, leader);
            }
            GroupRoute {
                broker_group: queues.broker_group.into(),
                queue_count: queues.queue_count,
                leader: known.1.clone(),
                term: known.0,
            }
        });
        let route = Route { exists: pushed.exists, kind, groups: groups.collect() };
        self.topics.insert(pushed.topic, Arc::new(route));
    }

    /// Takes over what a broker says of who leads in its place. True if that is news.
    fn redirect(&mut self, hint: &native::LeaderHint) -> bool {
        let Some(Ok(address)) = hint.address.as_ref().map(Address::of_native) else { return false };
        let known = self.leaders.entry(hint.broker_group.clone()).or_default();
        let told = (hint.term, Some(address));
        if hint.term < known.0 || *known == told {
            return false;
        }
        *known = told.clone();
        for route in self.topics.values_mut() {
            if route.group(&hint.broker_group).is_none() {
                continue;
            }
            let groups = &mut Arc::make_mut(route).groups;
            for group in groups.iter_mut().filter(|g| *g.broker_group == *hint.broker_group) {
                (group.term, group.leader) = told.clone();
            }
        }
        true
    }
}

/// Handle of the pushed routes; clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Routes {
    table: Arc<RwLock<RouteTable>>,
    /// Rises with every change of the table.
    version: watch::Sender<u64>,
    wanted: watch::Sender<BTreeSet<String>>,
    /// Whom each watch asks now.
    asked: Arc<Mutex<[Option<Address>; WATCHES]>>,
    /// The watch that is believed when it says that a topic does not exist.
    teller: watch::Sender<Option<usize>>,
}

impl Routes {
    pub(crate) fn new() -> Self {
        Self {
            table: Arc::default(),
            version: watch::Sender::new(0),
            wanted: watch::Sender::new(BTreeSet::new()),
            asked: Arc::default(),
            teller: watch::Sender::new(None),
        }
    }

    /// Told whenever a route may have changed.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.version.subscribe()
    }

    /// Asks for a topic's route from now on.
    pub(crate) fn want(&self, topic: &str) {
        self.wanted
            .send_if_modified(|topics| !topics.contains(topic) && topics.insert(topic.to_owned()));
    }

    /// A topic was created, so that its route will come.
    pub(crate) fn expect(&self, topic: &str) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        if table.topics.get(topic).is_some_and(|route| route.exists) {
            return;
        }
        table.topics.remove(topic);
        table.expected.insert(topic.to_owned());
    }

    /// The route as it was pushed last, also of a topic that does not exist.
    pub(crate) fn get(&self, topic: &str) -> Option<Arc<Route>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.topics.get(topic).cloned()
    }

    /// The route of a topic that exists. Waits for it as long as nobody has said that there is no
    /// such topic.
    pub(crate) async fn resolve(&self, topic: &str, until: Instant) -> Result<Arc<Route>, Error> {
        self.want(topic);
        let mut changes = self.changes();
        loop {
            changes.mark_unchanged();
            match self.get(topic) {
                Some(route) if route.exists => return Ok(route),
                Some(_) => return Err(Error::TopicNotFound { topic: topic.into() }),
                None => {}
            }
            let changed = tokio::time::timeout_at(until, changes.changed()).await;
            if !matches!(changed, Ok(Ok(()))) {
                return Err(Error::Refused {
                    code: Code::Unavailable,
                    message: format!("no route of topic {topic} came in time"),
                });
            }
        }
    }

    fn apply(&self, routes: Vec<native::TopicRoute>) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        routes.into_iter().for_each(|route| table.apply(route));
        drop(table);
        self.version.send_modify(|version| *version += 1);
    }

    /// Follows a broker that does not lead to the one that does.
    pub(crate) fn redirect(&self, hint: &native::LeaderHint) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let is_news = table.redirect(hint);
        drop(table);
        if is_news {
            self.version.send_modify(|version| *version += 1);
        }
    }

    /// All leaders that are known; they answer as access points, too.
    pub(crate) fn leaders(&self) -> BTreeSet<Address> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        table.leaders.values().filter_map(|(_, leader)| leader.clone()).collect()
    }

    /// Keeps watches open, each at another of the endpoints or of the leaders, until it is stopped:
    /// one that is cut off from the rest of the cluster does not know what it misses.
    pub(crate) async fn run(
        self,
        endpoints: Vec<Address>,
        connections: Arc<Connections>,
        stop: CancellationToken,
    ) {
        let watches = (0..WATCHES).map(|number| {
            self.clone().keep_watch(number, endpoints.clone(), Arc::clone(&connections), &stop)
        });
        futures::future::join_all(watches).await;
    }

    /// Picks whom a watch asks next: nobody whom another one asks.
    fn pick(&self, number: usize, turn: usize, endpoints: &[Address]) -> Option<Address> {
        let places = access_points(endpoints, self.leaders());
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(mine) = asked.get_mut(number) {
            *mine = None;
        }
        let free: Vec<&Address> =
            places.iter().filter(|place| !asked.iter().flatten().any(|at| at == *place)).collect();
        let picked = turn.checked_rem(free.len()).and_then(|at| free.get(at)).copied().cloned();
        if let Some(mine) = asked.get_mut(number) {
            mine.clone_from(&picked);
        }
        picked
    }

    async fn keep_watch(
        self,
        number: usize,
        endpoints: Vec<Address>,
        connections: Arc<Connections>,
        stop: &CancellationToken,
    ) {
        let mut backoff = Backoff::new();
        let mut wanted = self.wanted.subscribe();
        for turn in 0_usize.. {
            tokio::select! {
                () = stop.cancelled() => return,
                some = wanted.wait_for(|topics| !topics.is_empty()) => if some.is_err() { return },
            }
            if let Some(endpoint) = self.pick(number, turn, &endpoints) {
                let client = RoutesClient::new(connections.channel(&endpoint))
                    .max_decoding_message_size(crate::connection::GRPC_BYTES_MAX);
                tokio::select! {
                    () = stop.cancelled() => return,
                    error = self.watch(client, number, &mut backoff) => {
                        tracing::debug!(%endpoint, %error, "route watch ended");
                    }
                }
                self.falls_silent(number);
            }
            tokio::select! {
                () = stop.cancelled() => return,
                () = tokio::time::sleep(backoff.pause(fastrand::f64())) => {}
            }
        }
    }

    /// Whether a watch that was answered is the one to believe that a topic does not exist: the others
    /// may not have heard of it yet. It is the first, until it falls silent.
    fn tells_absence(&self, number: usize) -> bool {
        self.teller.send_if_modified(|teller| {
            let free = teller.is_none();
            if free {
                *teller = Some(number);
            }
            free
        });
        *self.teller.borrow() == Some(number)
    }

    fn falls_silent(&self, number: usize) {
        let mine = |teller: &mut Option<usize>| teller.take_if(|at| *at == number).is_some();
        self.teller.send_if_modified(mine);
    }

    /// Ends with the stream, and says why.
    async fn watch(
        &self,
        mut client: RoutesClient<tonic::transport::Channel>,
        number: usize,
        backoff: &mut Backoff,
    ) -> String {
        let (requests, outbound) = mpsc::channel(4);
        let mut wanted = self.wanted.subscribe();
        let mut teller = self.teller.subscribe();
        // What this one would tell if it were believed.
        let mut absent: BTreeMap<String, native::TopicRoute> = BTreeMap::new();
        let request = |topics: &BTreeSet<String>| WatchRoutesRequest {
            topics: topics.iter().cloned().collect(),
        };
        let first = request(&wanted.borrow_and_update());
        if requests.send(first).await.is_err() {
            return "the request stream closed".into();
        }
        let opening = client.watch_routes(ReceiverStream::new(outbound));
        let opened = tokio::time::timeout(OPEN_TIMEOUT, opening).await;
        let mut pushed = match opened {
            Ok(Ok(response)) => response.into_inner(),
            Ok(Err(status)) => return status.message().to_owned(),
            Err(_) => return "no answer".into(),
        };
        loop {
            tokio::select! {
                changed = wanted.changed() => {
                    let next = request(&wanted.borrow_and_update());
                    if changed.is_err() || requests.send(next).await.is_err() {
                        return "the request stream closed".into();
                    }
                }
                changed = teller.changed() => {
                    if changed.is_ok() && !absent.is_empty() && self.tells_absence(number) {
                        self.apply(absent.values().cloned().collect());
                    }
                }
                message = pushed.message() => match message {
                    Ok(Some(response)) => {
                        if let Some(error) = Error::of_native(response.status.as_ref()) {
                            return error.to_string();
                        }
                        backoff.reset();
                        let mut routes = response.routes;
                        for route in &routes {
                            match route.exists {
                                true => absent.remove(&route.topic),
                                false => absent.insert(route.topic.clone(), route.clone()),
                            };
                        }
                        let believed = self.tells_absence(number);
                        routes.retain(|route| route.exists || believed);
                        self.apply(routes);
                    }
                    Ok(None) => return "the stream ended".into(),
                    Err(status) => return status.message().to_owned(),
                },
            }
        }
    }
}

/// Whom to ask, in turn: the endpoints that were given, then who else is known.
pub(crate) fn access_points(endpoints: &[Address], leaders: BTreeSet<Address>) -> Vec<Address> {
    let others = leaders.into_iter().filter(|leader| !endpoints.contains(leader));
    endpoints.iter().cloned().chain(others).collect()
}

const OPEN_TIMEOUT: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    fn pushed(term: u64, port: u32) -> native::TopicRoute {
        let leader = Some(native::Address { host: "h".into(), port });
        let queues = native::QueueRoute {
            broker_group: "a".into(),
            queue_count: 2,
            leader: leader.filter(|_| port != 0),
            term,
        };
        native::TopicRoute {
            topic: "t".into(),
            exists: true,
            r#type: TopicType::Mixed.into(),
            topic_id: 1,
            queues: vec![queues],
        }
    }

    fn leader(routes: &Routes) -> Option<String> {
        let route = routes.get("t")?;
        route.group("a")?.leader.as_ref().map(ToString::to_string)
    }

    #[test]
    fn leader_of_an_older_term_is_ignored() {
        let routes = Routes::new();
        routes.apply(vec![pushed(3, 1)]);
        routes.apply(vec![pushed(2, 2)]);
        assert_eq!(leader(&routes).as_deref(), Some("h:1"));
        routes.apply(vec![pushed(4, 2)]);
        assert_eq!(leader(&routes).as_deref(), Some("h:2"));
        routes.apply(vec![pushed(4, 0)]);
        assert_eq!(leader(&routes).as_deref(), Some("h:2"), "another one may still see it");
        routes.apply(vec![pushed(5, 0)]);
        assert_eq!(leader(&routes), None);
    }

    #[test]
    fn who_does_not_lead_redirects_all_topics_but_to_no_older_term() {
        let routes = Routes::new();
        routes.apply(vec![pushed(3, 1)]);
        let hint = |term, port| native::LeaderHint {
            broker_group: "a".into(),
            address: Some(native::Address { host: "h".into(), port }),
            term,
        };
        let changes = routes.changes();
        routes.redirect(&hint(2, 2));
        routes.redirect(&hint(3, 1));
        routes.redirect(&native::LeaderHint { address: None, ..hint(9, 1) });
        assert!(!changes.has_changed().unwrap());
        assert_eq!(leader(&routes).as_deref(), Some("h:1"));
        routes.redirect(&hint(4, 2));
        assert!(changes.has_changed().unwrap());
        assert_eq!(leader(&routes).as_deref(), Some("h:2"));
        routes.apply(vec![pushed(3, 1)]);
        assert_eq!(leader(&routes).as_deref(), Some("h:2"), "pushed by who has not heard yet");
        let given = [Address::parse("n:1").unwrap()];
        let asked = access_points(&given, routes.leaders());
        assert_eq!(asked.iter().map(Address::as_str).collect::<Vec<_>>(), ["n:1", "h:2"]);
    }

    #[test]
    fn watches_ask_different_places_in_turn() {
        let routes = Routes::new();
        let given = ["n:1", "n:2", "n:3"].map(|text| Address::parse(text).unwrap());
        let pick = |number, turn, given: &[Address]| {
            routes.pick(number, turn, given).map(|place| place.to_string())
        };
        assert_eq!(pick(0, 0, &given).as_deref(), Some("n:1"));
        assert_eq!(pick(1, 0, &given).as_deref(), Some("n:2"));
        assert_eq!(pick(0, 1, &given).as_deref(), Some("n:3"));
        assert_eq!(pick(1, 1, &given).as_deref(), Some("n:2"));
        assert_eq!(pick(0, 0, &given[1..2]), None, "the other one asks the only one");
    }

    #[test]
    fn one_watch_at_a_time_is_believed_that_a_topic_does_not_exist() {
        let routes = Routes::new();
        assert!(routes.tells_absence(1), "whichever is answered first");
        assert!(!routes.tells_absence(0));
        routes.falls_silent(0);
        assert!(routes.tells_absence(1));
        let others = routes.teller.subscribe();
        routes.falls_silent(1);
        assert!(others.has_changed().unwrap(), "the other one is told");
        assert!(routes.tells_absence(0));
        assert!(!routes.tells_absence(1));
    }

    #[tokio::test]
    async fn resolve_waits_for_the_push() {
        let routes = Routes::new();
        let until = Instant::now() + Duration::from_secs(60);
        let waiting = routes.resolve("t", until);
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        assert!(routes.wanted.borrow().contains("t"));
        routes.apply(vec![pushed(1, 1)]);
        assert_eq!(waiting.await.unwrap().groups.len(), 1);
    }

    #[tokio::test]
    async fn topic_that_was_just_created_is_waited_for() {
        let routes = Routes::new();
        let missing = || native::TopicRoute { exists: false, ..pushed(1, 1) };
        routes.apply(vec![missing()]);
        routes.expect("t");
        let waiting = routes.resolve("t", Instant::now() + Duration::from_secs(60));
        tokio::pin!(waiting);
        assert!(futures::poll!(&mut waiting).is_pending());
        routes.apply(vec![missing()]);
        assert!(futures::poll!(&mut waiting).is_pending());
        routes.apply(vec![pushed(1, 1)]);
        assert!(waiting.await.is_ok());
    }

    #[tokio::test]
    async fn missing_topic_is_an_error_at_once() {
        let routes = Routes::new();
        routes.apply(vec![native::TopicRoute { exists: false, ..pushed(1, 1) }]);
        let until = Instant::now() + Duration::from_secs(60);
        let error = routes.resolve("t", until).await.unwrap_err();
        assert_eq!(error.code(), Code::TopicNotFound);
    }
}
