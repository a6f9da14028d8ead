//! Runs loads against a server, all on one thread.

use std::{
    cell::{Cell, RefCell},
    time::{Duration, Instant},
};

use futures::{
    StreamExt as _,
    future::{join_all, pending},
    stream::FuturesUnordered,
};

use super::{
    client::{Client, Sample},
    load::{Arrival, Load},
    plan::{Plan, Target, Words},
};

/// A load and the tasks it asks.
#[derive(Debug, Clone)]
pub struct Assigned {
    pub load: Load,
    pub targets: Vec<Target>,
}

/// How loads are run.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    pub client: &'a Client,
    pub words: Words,
    /// The same seed sends the same requests.
    pub seed: u64,
    /// No request is begun after this time.
    pub duration: Option<Duration>,
}

/// What came of a load.
#[derive(Debug, Clone)]
pub struct Measured {
    pub samples: Vec<Sample>,
    /// From the first request to the end of the last answer.
    pub elapsed: Duration,
}

impl Run<'_> {
    /// Runs loads side by side and tells `done` of each answer. Loads in the background stop, in the middle of an
    /// answer if need be, when the others are done.
    pub async fn together(&self, loads: &[Assigned], done: &dyn Fn()) -> Vec<Measured> {
        let state: Vec<_> = loads.iter().enumerate().map(|(i, assigned)| self.state(assigned, i, done)).collect();
        let begun = Instant::now();
        let run = |background: bool| {
            join_all(state.iter().filter(|s| s.load.background == background).map(|s| s.run(begun)).collect::<Vec<_>>())
        };
        tokio::select! {
            _ = run(false) => {}
            _ = async { run(true).await; pending::<()>().await } => {}
        }
        state.into_iter().map(|state| state.measured(begun)).collect()
    }

    /// Sends some requests of a load round and round to its tasks, as many at once as it has clients; what comes of
    /// them does not count.
    pub async fn warm_up(&self, assigned: &Assigned, requests: usize, done: &dyn Fn()) -> Vec<Sample> {
        let plan = RefCell::new(self.plan(assigned, usize::MAX));
        let (next, samples) = (Cell::new(0), RefCell::new(Vec::new()));
        let clients = match assigned.load.arrival {
            Arrival::Concurrency(clients) => clients,
            Arrival::Rate(_) => 8,
        };
        let client = || async {
            while next.get() < requests {
                let number = next.replace(next.get() + 1);
                let ask = plan.borrow_mut().round_robin(number);
                let Some(ask) = ask else { return };
                let sample = self.client.ask(ask, Instant::now()).await;
                samples.borrow_mut().push(sample);
                done();
            }
        };
        join_all((0..clients.min(requests)).map(|_| client())).await;
        samples.into_inner()
    }

    fn plan(&self, assigned: &Assigned, index: usize) -> Plan {
        let seed = self.seed.wrapping_add((index as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15));
        Plan::new(&assigned.load, &assigned.targets, self.words, seed)
    }

    fn state<'a>(&'a self, assigned: &'a Assigned, index: usize, done: &'a dyn Fn()) -> State<'a> {
        State {
            run: self,
            load: &assigned.load,
            plan: RefCell::new(self.plan(assigned, index)),
            samples: RefCell::default(),
            last_end: Cell::default(),
            done,
        }
    }
}

/// A load that is running.
struct State<'a> {
    run: &'a Run<'a>,
    load: &'a Load,
    plan: RefCell<Plan>,
    samples: RefCell<Vec<Sample>>,
    last_end: Cell<Option<Instant>>,
    done: &'a dyn Fn(),
}

impl State<'_> {
    async fn run(&self, begun: Instant) {
        match self.load.arrival {
            Arrival::Concurrency(clients) => {
                join_all((0..clients).map(|_| self.client(begun))).await;
            }
            Arrival::Rate(rate) => self.open_loop(begun, rate).await,
        }
    }

    /// Asks, waits for the answer, and asks again.
    async fn client(&self, begun: Instant) {
        while self.in_time(begun.elapsed()) {
            let ask = self.plan.borrow_mut().next();
            let Some(ask) = ask else { return };
            self.note(self.run.client.ask(ask, Instant::now()).await);
        }
    }

    /// Asks whenever a request is due. Its time counts from then, so that a server that holds us up
    /// does not look better for it.
    async fn open_loop(&self, begun: Instant, rate: f64) {
        let mut running = FuturesUnordered::new();
        let mut due = Duration::ZERO;
        while self.in_time(due) {
            let ask = self.plan.borrow_mut().next();
            let Some(ask) = ask else { break };
            let at = tokio::time::sleep_until((begun + due).into());
            tokio::pin!(at);
            loop {
                tokio::select! {
                    () = &mut at => break,
                    Some(sample) = running.next() => self.note(sample),
                }
            }
            running.push(self.run.client.ask(ask, begun + due));
            due += Duration::from_secs_f64(self.plan.borrow_mut().pause(rate));
        }
        while let Some(sample) = running.next().await {
            self.note(sample);
        }
    }

    fn in_time(&self, elapsed: Duration) -> bool {
        self.run.duration.is_none_or(|duration| elapsed < duration)
    }

    fn note(&self, sample: Sample) {
        self.samples.borrow_mut().push(sample);
        self.last_end.set(Some(Instant::now()));
        (self.done)();
    }

    fn measured(self, begun: Instant) -> Measured {
        let elapsed = self.last_end.get().map_or(Duration::ZERO, |end| end - begun);
        Measured { samples: self.samples.into_inner(), elapsed }
    }
}
