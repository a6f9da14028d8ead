//! The machine itself: a stack, its marks, a memo, and one step for each opcode that is known.

use std::collections::HashMap;

use super::{Global, MAX_BARE_BYTES, MAX_BYTES, Node, Pickle, PickleError, Ref, Storage};
use crate::convert::tensor::View;

/// The most values that one pickle builds.
const MAX_NODES: usize = 16 * 1024;

/// The most arguments of a call, and dimensions of a tensor.
const MAX_SHORT: usize = 8;

/// Runs the pickle that `bytes` begin with; a bare one may have the values of tensors in it.
pub(super) fn run(bytes: &[u8], is_bare: bool) -> Result<Pickle<'_>, PickleError> {
    let limit = if is_bare { MAX_BARE_BYTES } else { MAX_BYTES };
    let bytes = &bytes[..bytes.len().min(limit)];
    let mut machine = Machine { bytes, limit, is_bare, ..Machine::default() };
    let root = machine.run().map_err(|stop| match stop {
        Stop::Global(name) => PickleError::Global(name),
        Stop::Damaged(reason) => PickleError::Damaged { reason, at: machine.at },
    })?;
    Ok(Pickle { nodes: machine.nodes, root, len: machine.at })
}

/// Why the machine stopped; where, it knows itself.
#[derive(Debug)]
enum Stop {
    Global(String),
    Damaged(String),
}

type Step<T> = Result<T, Stop>;

fn damaged<T>(reason: impl Into<String>) -> Step<T> {
    Err(Stop::Damaged(reason.into()))
}

#[derive(Debug, Default)]
struct Machine<'a> {
    bytes: &'a [u8],
    /// The most bytes.
    limit: usize,
    is_bare: bool,
    at: usize,
    nodes: Vec<Node<'a>>,
    stack: Vec<Ref>,
    /// Heights of the stack at each open mark.
    marks: Vec<usize>,
    memo: HashMap<u32, Ref>,
}

impl<'a> Machine<'a> {
    fn run(&mut self) -> Step<Ref> {
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                op => self.step(op)?,
            }
        }
    }

    fn step(&mut self, op: u8) -> Step<()> {
        match op {
            // PROTO, FRAME: nothing depends on them.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' if self.marks.len() < MAX_NODES => self.marks.push(self.stack.len()),
            b'(' => return damaged(format!("it opens more than {MAX_NODES} marks")),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.pop_mark()?),

            b'N' => self.push(Node::None)?,
            0x88 => self.push(Node::Bool(true))?,
            0x89 => self.push(Node::Bool(false))?,
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()))?;
            }
            b'K' => {
                let value = self.byte()?;
                self.push(Node::Int(value.into()))?;
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()))?;
            }
            0x8a => self.long()?,
            b'G' => {
                self.take(8)?;
                self.push(Node::Float)?;
            }
            // BINUNICODE, SHORT_BINUNICODE, and Python 2's BINSTRING, SHORT_BINSTRING.
            b'X' | b'T' => {
                let len = u32::from_le_bytes(self.array()?);
                self.text(len as usize)?;
            }
            0x8c | b'U' => {
                let len = self.byte()?;
                self.text(len.into())?;
            }

            // BINBYTES, SHORT_BINBYTES, BINBYTES8.
            b'B' => {
                let len = u32::from_le_bytes(self.array()?);
                self.binary(len.into())?;
            }
            b'C' => {
                let len = self.byte()?;
                self.binary(len.into())?;
            }
            0x8e => {
                let len = u64::from_le_bytes(self.array()?);
                self.binary(len)?;
            }

            b')' => self.push(Node::Tuple(Vec::new()))?,
            0x85..=0x87 => {
                let first = self.height_below(usize::from(op - 0x84))?;
                let items = self.stack.split_off(first);
                self.push(Node::Tuple(items))?;
            }
            b't' => {
                let items = self.pop_mark()?;
                self.push(Node::Tuple(items))?;
            }
            b']' => self.push(Node::List(Vec::new()))?,
            b'l' => {
                let items = self.pop_mark()?;
                self.push(Node::List(items))?;
            }
            b'a' => {
                let item = self.pop()?;
                self.list()?.push(item);
            }
            b'e' => {
                let items = self.pop_mark()?;
                self.list()?.extend(items);
            }
            b'}' => self.push(Node::Dict(Vec::new()))?,
            b'd' => {
                let items = self.pop_mark()?;
                self.push(Node::Dict(Vec::new()))?;
                self.set(&items)?;
            }
            b's' => {
                let first = self.height_below(2)?;
                let items = self.stack.split_off(first);
                self.set(&items)?;
            }
            b'u' => {
                let items = self.pop_mark()?;
                self.set(&items)?;
            }

            b'q' => {
                let id = self.byte()?;
                self.remember(id.into())?;
            }
            b'r' => {
                let id = u32::from_le_bytes(self.array()?);
                self.remember(id)?;
            }
            0x94 => self.remember(self.memo.len() as u32)?,
            b'h' => {
                let id = self.byte()?;
                self.recall(id.into())?;
            }
            b'j' => {
                let id = u32::from_le_bytes(self.array()?);
                self.recall(id)?;
            }

            b'c' => {
                let (module, name) = (self.line()?, self.line()?);
                self.global(module, name)?;
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Node::Text(module), Node::Text(name)) = (self.node(module), self.node(name)) else {
                    return damaged("a global is named by something that is not text");
                };
                self.global(module, name)?;
            }
            // INST: a global by another opcode, only ever for objects.
            b'i' => {
                let (module, name) = (self.line()?, self.line()?);
                return Err(Stop::Global(full_name(module, name)));
            }
            b'Q' => self.persistent()?,
            b'R' => self.call()?,
            b'b' => self.build()?,
            0x81 | 0x92 | b'o' => return damaged("it makes an object, expected tensors alone"),
            _ => return damaged(format!("it has the opcode {op:#04x}, which torch.save does not write for tensors")),
        }
        Ok(())
    }

    fn take(&mut self, n: usize) -> Step<&'a [u8]> {
        match self.bytes.get(self.at..).and_then(|rest| rest.get(..n)) {
            Some(bytes) => {
                self.at += n;
                Ok(bytes)
            }
            None if self.bytes.len() >= self.limit => damaged(format!("it is longer than {} bytes", self.limit)),
            None => damaged("it ends too early"),
        }
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        let bytes = self.take(N)?;
        bytes.first_chunk().copied().map_or_else(|| damaged("it ends too early"), Ok)
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.array::<1>()?[0])
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(len) = rest.iter().position(|b| *b == b'\n') else { return damaged("a name has no end") };
        let line = self.take(len)?;
        self.take(1)?;
        std::str::from_utf8(line).map_or_else(|_| damaged("a name is not text"), Ok)
    }

    fn text(&mut self, len: usize) -> Step<()> {
        let bytes = self.take(len)?;
        match std::str::from_utf8(bytes) {
            Ok(text) => self.push(Node::Text(text)),
            Err(_) => damaged("a text is not UTF-8"),
        }
    }

    fn binary(&mut self, len: u64) -> Step<()> {
        let bytes = self.take(usize::try_from(len).unwrap_or(usize::MAX))?;
        self.push(Node::Bytes(bytes))
    }

    /// LONG1: little-endian, two's complement, of any length; longer than eight bytes is no size.
    fn long(&mut self) -> Step<()> {
        let len = self.byte()?;
        let bytes = self.take(len.into())?;
        if bytes.len() > 8 {
            return damaged("it has a number of more than 64 bits");
        }
        let fill = if bytes.last().is_some_and(|b| b & 0x80 != 0) { 0xff } else { 0 };
        let mut all = [fill; 8];
        all[..bytes.len()].copy_from_slice(bytes);
        self.push(Node::Int(i64::from_le_bytes(all)))
    }

    fn push(&mut self, node: Node<'a>) -> Step<()> {
        if self.nodes.len() >= MAX_NODES {
            return damaged(format!("it builds more than {MAX_NODES} values"));
        }
        self.stack.push(Ref(self.nodes.len()));
        self.nodes.push(node);
        Ok(())
    }

    /// The height of the stack under its `n` topmost values, which lie above the last mark.
    fn height_below(&self, n: usize) -> Step<usize> {
        let floor = self.marks.last().copied().unwrap_or(0);
        match self.stack.len().checked_sub(n).filter(|height| *height >= floor) {
            Some(height) => Ok(height),
            None => damaged("it takes a value from an empty stack"),
        }
    }

    fn pop(&mut self) -> Step<Ref> {
        self.height_below(1)?;
        self.stack.pop().map_or_else(|| damaged("it takes a value from an empty stack"), Ok)
    }

    fn pop_mark(&mut self) -> Step<Vec<Ref>> {
        match self.marks.pop() {
            Some(height) if height <= self.stack.len() => Ok(self.stack.split_off(height)),
            _ => damaged("it closes a mark that is not open"),
        }
    }

    fn node(&self, at: Ref) -> &Node<'a> {
        self.nodes.get(at.0).unwrap_or(&Node::None)
    }

    fn top(&mut self) -> Step<&mut Node<'a>> {
        let top = self.height_below(1)?;
        match self.stack.get(top).and_then(|at| self.nodes.get_mut(at.0)) {
            Some(node) => Ok(node),
            None => damaged("it takes a value from an empty stack"),
        }
    }

    fn list(&mut self) -> Step<&mut Vec<Ref>> {
        match self.top()? {
            Node::List(items) => Ok(items),
            _ => damaged("it appends to what is no list"),
        }
    }

    fn set(&mut self, items: &[Ref]) -> Step<()> {
        let (pairs, []) = items.as_chunks::<2>() else { return damaged("a key has no value") };
        match self.top()? {
            Node::Dict(entries) => entries.extend(pairs.iter().map(|[key, value]| (*key, *value))),
            _ => return damaged("it sets a key of what is no dict"),
        }
        Ok(())
    }

    fn remember(&mut self, id: u32) -> Step<()> {
        let top = self.height_below(1)?;
        // Each may be remembered under a few ids; there is no need for more ids than values.
        if self.memo.len() > MAX_NODES {
            return damaged(format!("it remembers more than {MAX_NODES} values"));
        }
        if let Some(at) = self.stack.get(top) {
            self.memo.insert(id, *at);
        }
        Ok(())
    }

    fn recall(&mut self, id: u32) -> Step<()> {
        match self.memo.get(&id) {
            Some(at) if self.stack.len() < MAX_NODES => self.stack.push(*at),
            Some(_) => return damaged(format!("it stacks more than {MAX_NODES} values")),
            None => return damaged(format!("it reads the memo entry {id}, which it never wrote")),
        }
        Ok(())
    }

    fn global(&mut self, module: &str, name: &str) -> Step<()> {
        match Global::named(module, name) {
            Some(global) if global != Global::LoadFromBytes || self.is_bare => self.push(Node::Global(global)),
            _ => Err(Stop::Global(full_name(module, name))),
        }
    }

    /// `('storage', torch.FloatStorage, key, location, len)`, with a None behind in the older form.
    fn persistent(&mut self) -> Step<()> {
        let id = self.pop()?;
        let fields = match self.node(id) {
            Node::Tuple(items) => items.iter().map(|at| self.node(*at)).collect(),
            _ => Vec::new(),
        };
        let storage = match fields[..] {
            [
                Node::Text("storage"),
                Node::Global(Global::Storage(dtype)),
                Node::Text(key),
                Node::Text(_),
                Node::Int(len),
            ]
            | [
                Node::Text("storage"),
                Node::Global(Global::Storage(dtype)),
                Node::Text(key),
                Node::Text(_),
                Node::Int(len),
                Node::None,
            ] if *len >= 0 => Storage { key, dtype: *dtype, len: *len as u64 },
            _ => return damaged("it refers to something outside that is no tensor's storage"),
        };
        self.push(Node::Storage(storage))
    }

    /// REDUCE: one of the calls that are known.
    fn call(&mut self) -> Step<()> {
        let (args, function) = (self.pop()?, self.pop()?);
        let args = match self.node(args) {
            Node::Tuple(args) if args.len() <= MAX_SHORT => args.clone(),
            _ => return damaged("it calls with what is no short tuple"),
        };
        match (self.node(function), &args[..]) {
            (Node::Global(Global::OrderedDict), []) => self.push(Node::Dict(Vec::new())),
            (Node::Global(Global::RebuildTensor), [storage, offset, shape, strides, ..]) => {
                let (Node::Storage(_) | Node::SavedStorage(_)) = self.node(*storage) else {
                    return damaged("a tensor has no storage");
                };
                let view =
                    View { offset: self.count(*offset)?, shape: self.counts(*shape)?, strides: self.counts(*strides)? };
                let storage = *storage;
                self.push(Node::Tensor(storage, view))
            }
            (Node::Global(Global::LoadFromBytes), [saved]) => match self.node(*saved) {
                Node::Bytes(saved) => self.push(Node::SavedStorage(saved)),
                _ => damaged("a storage is not stored as bytes"),
            },
            (Node::Global(Global::RebuildParameter), [tensor, ..]) => {
                let Node::Tensor(..) = self.node(*tensor) else { return damaged("a parameter has no tensor") };
                self.stack.push(*tensor);
                Ok(())
            }
            _ => damaged("it calls something in a way that torch.save does not"),
        }
    }

    /// BUILD: attributes of a state dict, such as `_metadata`, which are left alone.
    fn build(&mut self) -> Step<()> {
        self.pop()?;
        match self.top()? {
            Node::Dict(_) => Ok(()),
            _ => damaged("it sets attributes of what is no dict"),
        }
    }

    fn count(&self, at: Ref) -> Step<u64> {
        match self.node(at) {
            Node::Int(n) if *n >= 0 => Ok(*n as u64),
            _ => damaged("a tensor has an offset, a size or a stride that is no count"),
        }
    }

    fn counts(&self, at: Ref) -> Step<Vec<u64>> {
        match self.node(at) {
            Node::Tuple(items) if items.len() <= MAX_SHORT => items.iter().map(|at| self.count(*at)).collect(),
            _ => damaged("a tensor has a shape or strides that are no short tuple"),
        }
    }
}

fn full_name(module: &str, name: &str) -> String {
    format!("{module}.{name}").chars().take(120).flat_map(char::escape_debug).collect()
}
