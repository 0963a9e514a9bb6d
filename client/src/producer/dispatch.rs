//! The producer's task: gives each message its lane, hands runs to streams, sees to deadlines.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use drumlin_proto::native::{ProduceRequest, ProduceResponse, TopicType};
use drumlin_proto::route::{place_of_message_group, queues_in_route_order};
use tokio::sync::{OwnedSemaphorePermit, mpsc, oneshot};
use tokio::time::{Instant, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::Settings;
use super::creation::{Creation, create};
use super::lane::{Batching, Lane, LinkId, Pending};
use super::link::Link;
use super::window::{Ledger, Window};
use crate::Client;
use crate::connection::{Address, Backoff};
use crate::error::Error;
use crate::message::{Place, Receipt, Sealed};
use crate::route::{GroupRoute, Route};

/// How often deadlines and pauses are looked at.
const TICK: Duration = Duration::from_millis(20);
/// How long answers of a leader are waited for once another one leads: it may be frozen or cut off,
/// and what it was sent goes to the new one then.
const DEPOSED_GRACE: Duration = Duration::from_millis(500);
/// Commands and events taken in one go: what comes in together goes out together.
const DRAIN_MAX: usize = 1024;

/// A message that was let in.
#[derive(Debug)]
pub(super) struct Accepted {
    pub(super) topic: String,
    pub(super) sealed: Sealed,
    pub(super) charge: u32,
    pub(super) accepted_at: Instant,
    pub(super) deadline: Instant,
    pub(super) ack: Option<oneshot::Sender<Result<Receipt, Error>>>,
}

#[derive(Debug)]
pub(super) enum Command {
    Send(Box<Accepted>),
    Flush {
        done: oneshot::Sender<()>,
        /// Given back once the command is taken.
        _room: OwnedSemaphorePermit,
    },
}

#[derive(Debug)]
pub(super) enum Event {
    Answer {
        address: Address,
        link: LinkId,
        answer: ProduceResponse,
    },
    Down {
        address: Address,
        link: LinkId,
        reached: bool,
        reason: String,
    },
    /// What came of creating a topic on first use.
    Created {
        topic: Arc<str>,
        result: Result<(), Error>,
    },
}

/// A topic that messages were sent to.
#[derive(Debug)]
struct Topic {
    name: Arc<str>,
    route: Option<Arc<Route>>,
    /// Queues on each broker group of the route.
    queue_counts: Vec<u32>,
    /// Lanes in route order; those of queues that are gone are not among them.
    lanes: Vec<usize>,
    /// Where the next messages without a message group go, until a run of them is cut.
    sticky: usize,
    creation: Creation,
    /// Came before the route.
    unrouted: Vec<Pending>,
    /// Lanes that hold messages with a message group from before the queue list changed.
    moving: Vec<usize>,
    /// With a message group, behind what those lanes hold.
    held: Vec<Pending>,
}

/// One leader's stream, and the pause before the next one.
#[derive(Debug)]
struct Dial {
    link: Option<Link>,
    /// Lane of each request in flight.
    lanes: HashMap<u64, usize>,
    /// Since when other leaders are known for all of those.
    deposed_since: Option<Instant>,
    retry_at: Option<Instant>,
    backoff: Backoff,
}

#[derive(Debug)]
pub(super) struct Dispatcher {
    client: Client,
    settings: Settings,
    stop: CancellationToken,
    ledger: Ledger,
    topics: HashMap<Arc<str>, Topic>,
    lanes: Vec<Lane>,
    lane_of: HashMap<Place, usize>,
    dials: HashMap<Address, Dial>,
    next_link: LinkId,
    events: mpsc::Sender<Event>,
    incoming: mpsc::Receiver<Event>,
}

impl Dispatcher {
    pub(super) fn new(
        client: Client,
        settings: Settings,
        window: Arc<Window>,
        stop: CancellationToken,
    ) -> Self {
        let (events, incoming) = mpsc::channel(DRAIN_MAX);
        Self {
            client,
            settings,
            stop,
            ledger: Ledger::new(window),
            topics: HashMap::new(),
            lanes: Vec::new(),
            lane_of: HashMap::new(),
            dials: HashMap::new(),
            next_link: 1,
            events,
            incoming,
        }
    }

    /// Runs until it is stopped, or until all handles are gone and everything is settled. Returns
    /// how many messages were left unacknowledged.
    pub(super) async fn run(mut self, mut commands: mpsc::Receiver<Command>) -> u64 {
        let mut routes = self.client.routes().changes();
        let linger = self.settings.linger.max(Duration::from_millis(1));
        let mut tick = tokio::time::interval(TICK.min(linger));
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        if self.settings.linger.is_zero() {
            tick = tokio::time::interval(TICK);
            tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        let (mut sent, mut happened) = (Vec::new(), Vec::new());
        let mut open = true;
        while open || self.ledger.outstanding() > 0 {
            let busy = self.ledger.outstanding() > 0;
            // Every arm is cancellation-safe: receiving many takes nothing unless it resolves.
            tokio::select! {
                () = self.stop.cancelled() => break,
                count = commands.recv_many(&mut sent, DRAIN_MAX), if open => open = count > 0,
                _ = self.incoming.recv_many(&mut happened, DRAIN_MAX) => {}
                changed = routes.changed() => if changed.is_ok() { self.reroute(Instant::now()) },
                _ = tick.tick(), if busy => self.tick(Instant::now()),
            }
            let now = Instant::now();
            happened.drain(..).for_each(|event| self.on_event(event, now));
            self.move_ordered(now);
            sent.drain(..).for_each(|command| self.on_command(command, now));
            self.pump(now);
            self.ledger.finish_flushes();
        }
        self.close(&mut commands)
    }

    /// Fails what is left and counts it.
    fn close(mut self, commands: &mut mpsc::Receiver<Command>) -> u64 {
        commands.close();
        let mut left = self.ledger.outstanding();
        while let Ok(command) = commands.try_recv() {
            match command {
                Command::Send(accepted) => {
                    let Accepted { sealed, charge, ack, .. } = *accepted;
                    let waiter = self.ledger.accept(sealed.message_id, charge, ack);
                    self.ledger.settle(waiter, Err(Error::Closed));
                    left += 1;
                }
                Command::Flush { done, .. } => drop(done),
            }
        }
        for lane in &mut self.lanes {
            lane.close(&mut self.ledger);
        }
        for topic in self.topics.values_mut() {
            for message in topic.unrouted.drain(..).chain(topic.held.drain(..)) {
                self.ledger.settle(message.waiter, Err(Error::Closed));
            }
        }
        left
    }

    fn on_command(&mut self, command: Command, now: Instant) {
        match command {
            Command::Send(accepted) => {
                let accepted = *accepted;
                let message_id = accepted.sealed.message_id.clone();
                let waiter = self.ledger.accept(message_id, accepted.charge, accepted.ack);
                let message = Pending {
                    record_bytes: accepted.sealed.fields().record_bytes(),
                    sealed: accepted.sealed,
                    accepted_at: accepted.accepted_at,
                    deadline: accepted.deadline,
                    waiter,
                    maybe_stored: false,
                };
                self.dispatch(&accepted.topic, message, now);
            }
            Command::Flush { done, .. } => self.ledger.flush(done),
        }
    }

    fn on_event(&mut self, event: Event, now: Instant) {
        match event {
            Event::Answer { address, link, answer } => {
                let Some(dial) = self.dials.get_mut(&address) else { return };
                if dial.link.as_ref().is_none_or(|current| current.id != link) {
                    return;
                }
                dial.backoff.reset();
                let Some(lane) = dial.lanes.remove(&answer.sequence) else { return };
                if let Some(hint) = answer.status.as_ref().and_then(|status| status.leader.as_ref())
                {
                    self.client.routes().redirect(hint);
                }
                self.lanes[lane].answered(link, &answer, now, &mut self.ledger);
                self.rehome(lane, now);
            }
            Event::Down { address, link, reached, reason } => {
                self.on_down(&address, link, reached, &reason, now);
            }
            Event::Created { topic, result } => {
                let Some(topic) = self.topics.get_mut(&topic) else { return };
                topic.creation.answered(&result, now);
                match result {
                    // What was known is outdated; the new route is on its way.
                    Ok(()) => topic.route = topic.route.take().filter(|route| route.exists),
                    // The messages wait on, until their own deadlines.
                    Err(error) if error.is_retryable() => {
                        tracing::debug!(topic = &*topic.name, %error, "topic not created yet");
                    }
                    Err(error) => {
                        for message in topic.unrouted.drain(..) {
                            self.ledger.settle(message.waiter, Err(error.clone()));
                        }
                    }
                }
            }
        }
    }

    fn on_down(
        &mut self,
        address: &Address,
        link: LinkId,
        reached: bool,
        reason: &str,
        now: Instant,
    ) {
        let Some(dial) = self.dials.get_mut(address) else { return };
        if dial.link.as_ref().is_none_or(|current| current.id != link) {
            return;
        }
        tracing::debug!(reason, reached, "produce stream ended");
        dial.link = None;
        dial.lanes.clear();
        dial.retry_at = Some(now + dial.backoff.pause(fastrand::f64()));
        for lane in 0..self.lanes.len() {
            self.lanes[lane].link_down(link, reached, reason, now);
            self.rehome(lane, now);
        }
    }

    /// Finds the lane of a message, or keeps it until there is a route.
    fn dispatch(&mut self, topic: &str, message: Pending, now: Instant) {
        if !self.topics.contains_key(topic) {
            self.add_topic(topic, now);
        }
        let Some(topic) = self.topics.get_mut(topic) else { return };
        let route = topic.route.as_ref().filter(|route| route.exists && !topic.lanes.is_empty());
        let Some(route) = route else {
            topic.unrouted.push(message);
            let name = Arc::clone(&topic.name);
            self.create_if_missing(&name, now);
            return;
        };
        let message_group = message.sealed.message_group.as_deref();
        let fault = match (route.kind, message_group) {
            (TopicType::Normal, Some(_)) => "the topic takes no messages with a message group",
            (TopicType::Fifo, None) => "the topic takes messages with a message group only",
            _ => "",
        };
        if !fault.is_empty() {
            let error = Error::InvalidMessage { reason: fault.into() };
            self.ledger.settle(message.waiter, Err(error));
            return;
        }
        if message_group.is_some() && !topic.moving.is_empty() {
            topic.held.push(message);
            return;
        }
        let lane = match message_group {
            Some(message_group) => place_of_message_group(message_group, &topic.queue_counts)
                .and_then(|(group, queue_id)| {
                    let broker_group = Arc::clone(&route.groups.get(group)?.broker_group);
                    let place = Place { topic: Arc::clone(&topic.name), broker_group, queue_id };
                    self.lane_of.get(&place).copied()
                }),
            None => topic.lanes.get(topic.sticky).copied(),
        };
        match lane {
            Some(lane) => self.lanes[lane].push(message),
            None => topic.unrouted.push(message),
        }
    }

    fn add_topic(&mut self, name: &str, now: Instant) {
        let name: Arc<str> = name.into();
        self.client.routes().want(&name);
        let topic = Topic {
            name: Arc::clone(&name),
            route: None,
            queue_counts: Vec::new(),
            lanes: Vec::new(),
            sticky: 0,
            creation: Creation::new(),
            unrouted: Vec::new(),
            moving: Vec::new(),
            held: Vec::new(),
        };
        self.topics.insert(Arc::clone(&name), topic);
        self.reroute_topic(&name, now);
    }

    /// Asks for a topic that nobody knows to be created, where that is allowed.
    fn create_if_missing(&mut self, name: &str, now: Instant) {
        let Some(topic) = self.topics.get_mut(name) else { return };
        let missing = topic.route.as_ref().is_some_and(|route| !route.exists);
        if !missing || !topic.creation.may_ask(now) || topic.unrouted.is_empty() {
            return;
        }
        topic.creation.asked();
        let (name, admin) = (Arc::clone(&topic.name), self.client.admin());
        let (events, stop) = (self.events.clone(), self.stop.clone());
        self.client.tasks().spawn(async move {
            let result = tokio::select! {
                () = stop.cancelled() => return,
                result = create(&admin, &name) => result,
            };
            // Without a dispatcher nobody asks.
            events.send(Event::Created { topic: name, result }).await.ok();
        });
    }

    fn reroute(&mut self, now: Instant) {
        let names: Vec<_> = self.topics.keys().cloned().collect();
        names.iter().for_each(|name| self.reroute_topic(name, now));
    }

    /// Takes over the route as it is now, and sends on what waited for it.
    fn reroute_topic(&mut self, name: &Arc<str>, now: Instant) {
        let (Some(topic), Some(route)) =
            (self.topics.get_mut(name), self.client.routes().get(name))
        else {
            return;
        };
        let list = |route: &Route| -> Vec<(Arc<str>, u32)> {
            let queues = |group: &GroupRoute| (Arc::clone(&group.broker_group), group.queue_count);
            route.groups.iter().map(queues).collect()
        };
        let moves = topic.route.as_deref().is_some_and(|before| list(before) != list(&route));
        if moves {
            let holds = |lane: &&usize| self.lanes.get(**lane).is_some_and(Lane::has_ordered);
            let holding: Vec<usize> = topic.lanes.iter().filter(holds).copied().collect();
            topic.moving.extend(holding);
            topic.moving.sort_unstable();
            topic.moving.dedup();
        }
        topic.queue_counts = route.groups.iter().map(|group| group.queue_count).collect();
        topic.lanes.clear();
        for (group, queue_id) in queues_in_route_order(&topic.queue_counts) {
            let Some(group) = route.groups.get(group) else { continue };
            let broker_group = Arc::clone(&group.broker_group);
            let place = Place { topic: Arc::clone(name), broker_group, queue_id };
            let lane = *self.lane_of.entry(place).or_insert_with_key(|place| {
                self.lanes.push(Lane::new(place.clone()));
                self.lanes.len() - 1
            });
            topic.lanes.push(lane);
        }
        if topic.route.is_none() && !topic.lanes.is_empty() {
            // Producers that start together begin at different queues.
            topic.sticky = fastrand::usize(..topic.lanes.len());
        }
        topic.sticky %= topic.lanes.len().max(1);
        for lane in &topic.lanes {
            let Some(lane) = self.lanes.get_mut(*lane) else { continue };
            let led = |route: &Route| {
                route.group(&lane.place.broker_group).map(|g| (g.term, g.leader.clone()))
            };
            if topic.route.as_deref().is_some_and(|before| led(before) != led(&route)) {
                lane.leader_changed();
            }
        }
        topic.route = Some(route);
        let waiting = std::mem::take(&mut topic.unrouted);
        waiting.into_iter().for_each(|message| self.dispatch(name, message, now));
    }

    /// Brings messages with a message group to where it belongs by now, once nothing of it is on its
    /// way to where it belonged before; what came meanwhile follows behind them.
    fn move_ordered(&mut self, now: Instant) {
        let moving = self.topics.values().filter(|topic| !topic.moving.is_empty());
        let names: Vec<_> = moving.map(|topic| Arc::clone(&topic.name)).collect();
        for name in names {
            let Some(topic) = self.topics.get_mut(&name) else { continue };
            let mut messages = Vec::new();
            topic.moving.retain(|lane| {
                let given = self.lanes.get_mut(*lane).and_then(Lane::give_away_ordered);
                let stays = given.is_none();
                messages.extend(given.unwrap_or_default());
                stays
            });
            // Behind them, but ahead of what comes from now on.
            messages.append(&mut topic.held);
            if !topic.moving.is_empty() {
                topic.held = messages;
                continue;
            }
            messages.into_iter().for_each(|message| self.dispatch(&name, message, now));
        }
    }

    /// Moves what need not stay in an ailing lane to a healthy one of another broker group.
    fn rehome(&mut self, ailing: usize, now: Instant) {
        if self.lanes[ailing].healthy() || !self.lanes[ailing].has_work() {
            return;
        }
        let place = self.lanes[ailing].place.clone();
        let Some(topic) = self.topics.get(&place.topic) else { return };
        let other = topic.lanes.iter().copied().find(|lane| {
            let lane = &self.lanes[*lane];
            lane.place.broker_group != place.broker_group
                && lane.healthy()
                && self.leader_of(&lane.place).is_some_and(|leader| {
                    self.dials.get(&leader).is_none_or(|d| d.retry_at.is_none_or(|at| at <= now))
                })
        });
        let Some(other) = other else { return };
        let (runs, messages) = self.lanes[ailing].give_away();
        runs.into_iter().for_each(|run| self.lanes[other].take_run(run));
        messages.into_iter().for_each(|message| self.lanes[other].push(message));
        if let Some(topic) = self.topics.get_mut(&place.topic) {
            let at = topic.lanes.iter().position(|lane| *lane == other);
            topic.sticky = at.unwrap_or(topic.sticky);
        }
    }

    fn leader_of(&self, place: &Place) -> Option<Address> {
        let route = self.topics.get(&place.topic)?.route.as_ref()?;
        route.group(&place.broker_group)?.leader.clone()
    }

    /// Gives streams up whose leaders were replaced and do not answer.
    fn leave_deposed(&mut self, now: Instant) {
        let mut left = Vec::new();
        for (address, dial) in &self.dials {
            let Some(link) = &dial.link else { continue };
            let is_led_elsewhere = |lane: &usize| {
                self.lanes.get(*lane).is_some_and(|lane| {
                    self.leader_of(&lane.place).is_some_and(|leader| leader != *address)
                })
            };
            let deposed = !dial.lanes.is_empty() && dial.lanes.values().all(is_led_elsewhere);
            left.push((address.clone(), link.id, deposed));
        }
        for (address, link, deposed) in left {
            let Some(dial) = self.dials.get_mut(&address) else { continue };
            if !deposed {
                dial.deposed_since = None;
            } else if now >= *dial.deposed_since.get_or_insert(now) + DEPOSED_GRACE {
                dial.deposed_since = None;
                let reason = format!("{address} does not lead any more and does not answer");
                self.on_down(&address, link, true, &reason, now);
            }
        }
    }

    fn tick(&mut self, now: Instant) {
        self.leave_deposed(now);
        for lane in &mut self.lanes {
            lane.wake(now);
            lane.expire(now, &mut self.ledger);
        }
        for topic in self.topics.values_mut() {
            let is_late = |message: &mut Pending| message.deadline <= now;
            for message in topic.unrouted.extract_if(.., is_late) {
                let no_route = || format!("no route of topic {} came", topic.name);
                let reason = topic.creation.last_failure.clone().unwrap_or_else(no_route);
                let error = message.too_late(reason);
                self.ledger.settle(message.waiter, Err(error));
            }
            for message in topic.held.extract_if(.., is_late) {
                let reason = format!("the queue list of topic {} was being changed", topic.name);
                let error = message.too_late(reason);
                self.ledger.settle(message.waiter, Err(error));
            }
        }
        let names: Vec<_> = self.topics.keys().cloned().collect();
        names.iter().for_each(|name| self.create_if_missing(name, now));
    }

    /// Sends all that may be sent.
    fn pump(&mut self, now: Instant) {
        for lane in 0..self.lanes.len() {
            if self.lanes[lane].has_work() {
                self.pump_lane(lane, now);
            }
        }
    }

    fn pump_lane(&mut self, index: usize, now: Instant) {
        let Some(leader) = self.leader_of(&self.lanes[index].place) else { return };
        let batching = Batching {
            run_bytes_max: self.settings.run_bytes_max,
            linger: self.settings.linger,
            hurry: self.ledger.flushing(),
        };
        self.open_link(&leader, now);
        let Some(dial) = self.dials.get_mut(&leader) else { return };
        let Some(link) = dial.link.as_mut() else { return };
        let lane = &mut self.lanes[index];
        let mut cut = false;
        while link.has_room() && lane.may_send(link.id, now) {
            let Some(run) = lane.next_run(&batching, now) else { break };
            let left = run.deadline.saturating_duration_since(now).as_millis();
            let request = ProduceRequest {
                sequence: 0,
                topic: lane.place.topic.to_string(),
                queue_id: i32::try_from(lane.place.queue_id).unwrap_or(i32::MAX),
                run: run.bytes.clone(),
                resume: lane.resume(),
                timeout_ms: u32::try_from(left).unwrap_or(u32::MAX).max(1),
            };
            let Some(sequence) = link.send(request) else {
                lane.unsend(run);
                break;
            };
            lane.sent(link.id, sequence, run);
            dial.lanes.insert(sequence, index);
            cut = true;
        }
        if cut {
            self.move_on(index);
        }
    }

    /// After a run was cut the next messages without a message group go to the next queue.
    fn move_on(&mut self, index: usize) {
        let Some(topic) = self.topics.get_mut(&self.lanes[index].place.topic) else { return };
        if topic.lanes.get(topic.sticky) != Some(&index) {
            return;
        }
        let count = topic.lanes.len();
        let candidates = (1..=count).map(|step| (topic.sticky + step) % count);
        let healthy = |at: &usize| topic.lanes.get(*at).is_some_and(|l| self.lanes[*l].healthy());
        topic.sticky = candidates.clone().find(healthy).unwrap_or((topic.sticky + 1) % count);
    }

    /// Begins a stream to a leader, unless there is one or it just failed.
    fn open_link(&mut self, leader: &Address, now: Instant) {
        let dial = self.dials.entry(leader.clone()).or_insert_with(|| Dial {
            link: None,
            lanes: HashMap::new(),
            deposed_since: None,
            retry_at: None,
            backoff: Backoff::new(),
        });
        if dial.link.is_some() || dial.retry_at.is_some_and(|at| at > now) {
            return;
        }
        let channel = self.client.connections().channel(leader);
        let (link, task) = Link::new(self.next_link, leader.clone(), channel, self.events.clone());
        self.next_link += 1;
        dial.retry_at = None;
        dial.link = Some(link);
        self.client.tasks().spawn(task.run());
    }
}
